"""Makes shards out of what a user has: datasets, PDFs, a CSV of queries and images, pages without queries, drawn pages.

All of it runs before training and off its path: training reads shards, whoever wrote them.
"""

"""Makes shards out of what a user has: drawn pages, PDFs, a CSV of queries and images.

All of it runs before training and off its path: training reads shards, whoever wrote them.
"""

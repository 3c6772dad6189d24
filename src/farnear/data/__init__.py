"""From tar shards to a rank's preprocessed mini-batches.

``index`` scans the shards once (``tarwalk`` reads the tar headers, ``scan`` one shard's samples), ``plan`` decides
which pairs form which global batch, ``read`` fetches one query or one page, ``loader`` runs the worker processes.
Between them travel row numbers only, so any step of any epoch can be reached without reading what lies before it.
"""

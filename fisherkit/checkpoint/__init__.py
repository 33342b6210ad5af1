"""Other people's files: lazy reads, streamed writes, and no trust in what a header or an index says."""

"""What is behind `ringred.DistributedDataParallel`: buckets, backwards, reductions, checks and reports."""

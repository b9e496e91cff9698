"""The parameter server: policies, servers, workers."""

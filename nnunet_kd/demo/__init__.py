"""The embedded example: three small synthetic domains, and the whole way from planning to a table and a figure."""

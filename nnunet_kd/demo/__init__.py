"""The embedded example: three small synthetic domains, all three tasks, from planning to a table and a figure."""

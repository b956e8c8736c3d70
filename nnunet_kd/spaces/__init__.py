"""Label spaces and label maps, channel spaces (numpy and torch only)."""

"""Leaderboards: a recipe in YAML -> commands with their dependencies -> finished runs -> a table."""

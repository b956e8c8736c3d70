"""Planners: joint plans for the teacher, plans for smaller students; reached through the console commands."""

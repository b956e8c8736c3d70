"""Prediction with a head of the joint teacher, and export to plain nnU-Net model folders."""

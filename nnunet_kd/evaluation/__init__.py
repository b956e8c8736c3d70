"""How good a segmentation is, and whether one method is better than another: metrics, paired statistics, tables."""

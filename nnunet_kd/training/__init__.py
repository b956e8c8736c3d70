"""Bodies of the trainers. The folder ``trainers`` re-exports them for nnU-Net's discovery."""

"""Classification and detection: plan, head, loss, decoding and training metric of one task side by side."""

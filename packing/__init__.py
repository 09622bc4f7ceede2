"""From trained checkpoints to a Kaggle dataset and kernel."""

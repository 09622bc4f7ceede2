"""What Kaggle runs, and nothing else; `build_kernel.py` joins it into one file."""

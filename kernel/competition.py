"""The competition: what is the same for every bundle and every submission of it."""

SLUG = "severstal-steel-defect-detection"
N_CLASSES = 4
IMAGE_SIZE = (256, 1600)  # (H, W)
N_SCORED_IMAGES = 5506  # of the scored run
TIME_LIMIT_S = 3600.0  # Kaggle's hour
N_TRAINING_IMAGES = 12_568
N_CLEAN_TRAINING_IMAGES = 5902
TRAINING_IMAGES_WITH_CLASS = {1: 897, 2: 247, 3: 5150, 4: 801}

"""Where the project's own files lie, and what lies in a bundle's folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "weights"
DATASET_METADATA = ROOT / "dataset-metadata.json"
KERNEL_METADATA = ROOT / "kernel" / "kernel-metadata.json"
SCRIPT = ROOT / "kernel" / "inference.py"
OUT = Path("dist")  # where a bundle goes, unless --out says otherwise
MEMBERS = ROOT / "training" / "members.txt"
NOTEBOOK = "inference.ipynb"  # of SCRIPT, in the bundle
FIT_SCRIPT = "fit.py"  # of the kernel that fits
WHEEL_CACHE = ROOT / ".cache" / "wheels"

# In a bundle's folder, beside dataset/ and kernel/:
CALIBRATION = "calibration.json"  # what a run on Kaggle measured; the next build keeps it
FIT = "fit"  # the kernel that fits; a build leaves it
REPORT, LAST_REPORT = "report", "report-before"  # a dry run's, and that of a bundle before this

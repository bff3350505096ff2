"""Packaging of genas-plugins: the core, one package per host framework, and the configurations.

Entry points are in ``setup.cfg``.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"

# Only these: the checkout also holds tests, benchmarks and documentation, which are not for users' machines.
TOP_LEVEL = ["genas_plugins", "nni_strategy", "timm_models", "detectron2_backbones", "mmseg_backbones"]

EXTRAS: dict[str, list[str]] = {
    "nni": [
        "nni>=3.0,<3.1",
        "pytorch-lightning>=2.4",
        "torchvision",
        "scikit-learn",
        "tqdm",
        "pillow",
        # NNI 3.0's command line and trial runner import pkg_resources, which setuptools 82 dropped.
        "setuptools<82",
    ],
    # scikit-learn for ImageNet-O's figure.
    "timm": ["timm>=1.0.31", "torchvision", "pillow", "tensorboard", "scikit-learn"],
    # mmcv-lite because mmcv has no wheels for current torch; docs/mmseg.md says how one is compiled in its place.
    # ftfy and regex are imported by mmsegmentation, which does not declare them.
    "mmseg": [
        "mmsegmentation>=1.2.2,<1.3",
        "mmengine>=0.10.7",
        "mmcv-lite>=2.0.0rc4,<2.2",
        "ftfy",
        "regex",
        "timm>=1.0.31",
        "torchvision",
        "pillow",
        # The pictures of which the quickstart's scenes are made.
        "scikit-image",
        # mmengine reads configurations of packages (mmseg::...) by pkg_resources, which setuptools 82 dropped.
        "setuptools<82",
    ],
    # OneDL's fork of the above, with the same import names.
    "onedl": [
        "onedl-mmsegmentation>=1.4.2,<1.5",
        "onedl-mmengine>=0.10.12,<0.11",
        "onedl-mmcv>=2.3.6,<2.4",
        "timm>=1.0.31",
        "torchvision",
        "pillow",
        "scikit-image",
    ],
    # What RetinaNet needs besides Detectron2 itself, which is not on PyPI and so cannot be listed here.
    "detectron2": [
        "yacs",
        "fvcore",
        # As Detectron2 has it.
        "iopath<0.1.10",
        "omegaconf",
        "hydra-core",
        "pycocotools",
        "cloudpickle",
        "tabulate",
        "termcolor",
        "tensorboard",
        "matplotlib>=3.6",
        "opencv-python",
        # Detectron2 is built without isolation, for which setuptools has bdist_wheel since 70.1; its model zoo
        # imports pkg_resources, which setuptools 82 dropped.
        "setuptools>=70.1,<82",
        "timm>=1.0.31",
        "torchvision",
        "pillow",
        # The pictures of which the quickstart's images are made.
        "scikit-image",
    ],
    # The ground truth from NNI's database, which peewee 4 cannot read, and from the NATS-Bench archive; a CSV needs
    # neither.
    "nasbench201": ["peewee>=3.14,<4", "nats-bench>=1.8"],
    "plots": ["matplotlib>=3.6"],
    # What torch.onnx writes with, what quantises and compares, and timm, of whose networks most are exported.
    "export": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20", "timm>=1.0.31", "torchvision", "pillow"],
}
# Not the fork: it would overwrite files of mmseg's.
EXTRAS["all"] = sorted({requirement for name, extra in EXTRAS.items() if name != "onedl" for requirement in extra})
# The site, the tutorial's notebook, and what CI looks at a release with.
EXTRAS["docs"] = [
    "mkdocs>=1.6",
    "mkdocs-material>=9.6",
    "mkdocstrings[python]>=1.0",
    "matplotlib>=3.6",
    "nbclient>=0.10",
    "ipykernel>=6.29",
    "build>=1.2",
    "twine>=6",
]
EXTRAS["test"] = ["pytest>=8", "pytest-xdist>=3.5", "ruff", "psutil", "jsonschema>=4.18"]

setup(
    name="genas-plugins",
    version=runpy.run_path(str(ROOT / "genas_plugins" / "_version.py"))["__version__"],
    description="GeNAS, architecture search by flat minima, for NNI, timm, Detectron2 and MMSegmentation",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    author="The genas-plugins authors",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["neural architecture search", "flat minima", "NNI", "timm", "Detectron2", "MMSegmentation"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # The checkout keeps the configurations at its top level, where the hosts' users look for them; an
    # installation gets the same tree as genas_plugins/configs, because it must not claim the name "configs".
    packages=[
        *find_packages(include=[pattern for name in TOP_LEVEL for pattern in (name, f"{name}.*")]),
        "genas_plugins.configs",
    ],
    package_dir={"genas_plugins.configs": "configs"},
    package_data={"": ["py.typed", "*.json", "*.csv", "*.js"], "genas_plugins.configs": ["**/*"]},
    exclude_package_data={"": ["**/__pycache__/*", "*.py[cod]"]},
    include_package_data=False,
    install_requires=[
        "torch>=2.5",
        "numpy",
        "scipy>=1.12",
        "safetensors",
        "pyyaml",
        "pydantic>=2.12",
    ],
    extras_require=EXTRAS,
    zip_safe=False,
)

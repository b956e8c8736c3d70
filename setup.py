"""Build script: metadata is in pyproject.toml; this file only maps folders to packages."""

from setuptools import find_packages, setup

MAPPED_FOLDERS = ("trainers", "planners")  # visible at top level, installed inside nnunet_kd

packages = find_packages(include=["nnunet_kd", "nnunet_kd.*"])
for folder in MAPPED_FOLDERS:
    packages += [f"nnunet_kd.{folder}", *(f"nnunet_kd.{folder}.{subfolder}" for subfolder in find_packages(folder))]

setup(packages=packages, package_dir={f"nnunet_kd.{folder}": folder for folder in MAPPED_FOLDERS})

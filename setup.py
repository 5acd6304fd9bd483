"""Packages configs/ as bayesdiff/configs; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["bayesdiff*"]), "bayesdiff.configs", "hydra_plugins"],
    package_dir={"bayesdiff.configs": "configs"},
    include_package_data=False,
    # Hydra knows the group local by its folder; what is in there is of one machine alone.
    package_data={"bayesdiff.configs": ["**/*.yaml", "local/.gitkeep"]},
    exclude_package_data={"bayesdiff.configs": ["local/*.yaml"]},
)

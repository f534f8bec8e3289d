"""Maps the top-level ``kernels`` folder into the package as ``catimage_accel.kernels``."""

from setuptools import find_packages, setup

kernel_packages = ["catimage_accel.kernels", *(f"catimage_accel.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["catimage_accel", "catimage_accel.*"]), *kernel_packages],
    package_dir={"catimage_accel.kernels": "kernels"},
)

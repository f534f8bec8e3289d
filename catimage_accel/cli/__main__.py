"""``python -m catimage_accel.cli``, for launchers of several processes that take a module."""

from catimage_accel.cli import app

app(prog_name="catimage")

"""HTTP server: OpenAI's Images API over a catalog, one executor for all requests, Ray when one machine is not enough.

Imported by the command that serves; needs `pip install catimage-accel[serve]`.
"""

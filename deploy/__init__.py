"""What deploys the server; as a package, what checks it (check_image.py)."""

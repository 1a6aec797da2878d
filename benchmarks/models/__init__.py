"""Natural language models for measurements and tests: fetched by name, converted once, kept outside the repository."""

from benchmarks.models.catalogue import CATALOGUE, Package, Source
from benchmarks.models.fetch import ModelError, cache_folder, path_of

__all__ = ["CATALOGUE", "ModelError", "Package", "Source", "cache_folder", "path_of"]

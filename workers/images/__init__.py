"""Images in prompts: references to them, and the families of models that see them.

A batch holds references (a path, or the bytes of an image file), never pixels. Each rank makes the
pixels that its own micro-batches read. Video, audio and images in responses are left out.
"""

from workers.images.families import ImageFamily, family_of, sees_images
from workers.images.processor import ImageProcessor
from workers.images.reference import ImageReference

__all__ = ["ImageFamily", "ImageProcessor", "ImageReference", "family_of", "sees_images"]

from bayesdiff.models.generative import GenerativeModel

__all__ = ["GenerativeModel"]

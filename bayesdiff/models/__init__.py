from bayesdiff.models.generative import GenerativeModel, whole_of

__all__ = ["GenerativeModel", "whole_of"]

from bayesdiff.models.belief import BeliefNetwork
from bayesdiff.models.generative import GenerativeModel, whole_of

__all__ = ["BeliefNetwork", "GenerativeModel", "whole_of"]

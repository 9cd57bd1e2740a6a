"""Small hubs on the loopback that answer as the packages of ModelScope and AI Studio expect, and fail when they are told to."""

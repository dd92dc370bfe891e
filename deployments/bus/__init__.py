"""The token bus: tokens go beside the handle call, one frame an engine step for each ingress."""

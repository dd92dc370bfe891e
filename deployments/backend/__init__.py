"""`RayBackend`: how an ingress gets its answers from replicas, and goes on when one is lost."""

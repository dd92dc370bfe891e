"""Applications that only `torchweave bench` deploys."""

"""Two checkpoints, tensor by tensor (numpy): exact thresholds over all of them, pruning and blending, rewriting."""

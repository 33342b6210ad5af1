"""Model as the engine sees it: config, a skeleton without weights, weights by the group, and the plan of a run."""

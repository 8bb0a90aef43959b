"""The dense half of a decoder layer: projections and MLP, fused with the norms beside them."""

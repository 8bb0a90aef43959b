"""`packscore score | rank | decide --ray`: a file in parts, by the workers of a Ray cluster."""

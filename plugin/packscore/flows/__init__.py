"""Requests to launches: costs, plans, pages, packing, and the contract of an engine."""

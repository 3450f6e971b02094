"""Metrics of traffic simulation and motion forecasting, in torch, reducible over processes."""

"""Answers over HTTP from an export alone: the engine, the live export, the app, and the deployment on Ray Serve."""

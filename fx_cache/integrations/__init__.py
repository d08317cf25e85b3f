"""Where others call: pipelines of diffusers and the like, and serving engines. Thin, and nobody imports from here."""

"""The Lipschitz-constrained variational autoencoder (privacy.md, section 1)."""

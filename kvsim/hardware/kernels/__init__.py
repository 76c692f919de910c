"""What one kernel costs on a GPU: closed forms whose constants stand in the catalogue, fitted to measured tables."""

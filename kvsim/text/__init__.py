"""How people write figures and names, and how what they wrote is shown: units, names, documents."""

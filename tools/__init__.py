"""Programs beside the method: python -m tools.NAME config.yaml [key=value ...]"""

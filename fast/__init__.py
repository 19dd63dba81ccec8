"""Exact speed-ups for model.py. Each is equal to a plain form there, and its tests compare the two.

They know the layers of Qwen3-VL, Qwen2.5-VL and Qwen2-VL. model.shared_prefix=false goes without.
"""

"""Placeholder"""
class Node:
    pass

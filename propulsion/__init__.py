"""propulsion"""

"""Do learned weights help, in all domains, and do they ever hurt?"""

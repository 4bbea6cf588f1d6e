"""The paper's tables and Figure 2 beside what was measured."""

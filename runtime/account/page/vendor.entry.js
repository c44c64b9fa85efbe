import cytoscape from "cytoscape";
import dagre from "@dagrejs/dagre";
Object.assign(window, { cytoscape, dagre });

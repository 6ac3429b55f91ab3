// Starts Swagger UI. A file, as the page's policy allows no inline script.

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  tryItOutEnabled: true,
  validatorUrl: null, // the validator is a stranger's server
});
